"""Who writes rollouts: one engine per file behind one interface, `engine.Engine`; `opening` makes
the one that is asked for. Token ids go in and token ids come out. Read `engine` first."""
