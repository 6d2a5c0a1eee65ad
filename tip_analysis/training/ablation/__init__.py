"""The paper's experiments: presets, plans before anything is loaded, one arm, and the study of all
arms."""
