"""DWQ: a student whose scales are trained to say what its teacher says."""
