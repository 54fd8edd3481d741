"""Evaluation: paired runs with full and with PARO attention, metrics, records and the HTML report."""
