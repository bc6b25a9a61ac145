"""The tables and figures of the papers, and what their authors left to others, as commands."""
