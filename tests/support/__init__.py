"""What tests share: makers of problems, measures of accuracy, and stand-ins for hardware that is missing."""
