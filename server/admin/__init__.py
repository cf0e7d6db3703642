"""The admin port: metrics for scrapers and control for operators, on a loopback address of its own."""
