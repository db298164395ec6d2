"""DWQ: a student whose scales are trained to reproduce its teacher's distribution over tokens."""
