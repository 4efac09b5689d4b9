"""The legs that Snakemake runs, one module each: every one reads hand-over files and leaves its own."""
