"""Rollouts that other tools wrote: one reader per family of formats. `formats` lists them; read it
first."""
