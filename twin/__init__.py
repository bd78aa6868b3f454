"""The rendered twin of MVTec LOCO: five categories, drawn. Start with render.py.

A category's file holds its logical faults with their saturation thresholds, up to 1 a share of the
defect's area, else pixels of a 256 px photo; its structural faults, which count whole; and `paint`,
which draws a good photo, or one with a fault."""
