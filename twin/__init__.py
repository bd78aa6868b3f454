"""The rendered twin of MVTec LOCO: five categories, drawn. Start with render.py."""
