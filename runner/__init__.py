"""What carries the experiment: a module for each job. A first reading of the project can skip this folder."""
