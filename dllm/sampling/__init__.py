"""From a canvas to its text: what a pass reveals (`plan`, `reveal`), one pass (`step`), and the loops over passes."""
