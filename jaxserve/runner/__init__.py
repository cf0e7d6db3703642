"""Runs plans on the device: packs a StepPlan into arrays, launches the compiled step, collects its tokens."""
