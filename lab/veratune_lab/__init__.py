"""The experiments: tables and figures of the papers, and measurements beside other programs."""
