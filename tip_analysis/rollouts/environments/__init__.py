"""Rollouts over several turns: an environment shows a task, answers what the student writes, and
says what the whole was worth. Token ids are carried forward exactly. Read `protocol` first, then
`episodes`."""
