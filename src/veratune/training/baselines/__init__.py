"""The methods that VeRA is compared with."""
