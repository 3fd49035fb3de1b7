"""Documents as tables, plots and pages, and the comparison of two of them."""
