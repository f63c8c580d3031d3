"""The specification of each op in plain torch: any device, float64 too."""
