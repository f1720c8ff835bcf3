"""Models and backends made for benchmarks and tests."""
