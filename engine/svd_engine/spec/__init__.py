"""The ground: tensor tables, profile, model, bounds, and the contract of networks and backends."""
