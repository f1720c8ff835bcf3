"""Load testing: `packtrain load`. What is sent (scenario, work), who sends it (leader, sender), what came of it (summary)."""
