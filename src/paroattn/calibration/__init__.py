"""Calibration: statistics of attention maps, taken while a model runs, and the choice of orders and masks from them."""
