"""The four networks: their tensor tables (`spec`) and the torch modules behind them."""
