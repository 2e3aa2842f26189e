"""What a recipe will take, before anything of it runs: seconds, memory and disk of each stage."""
