"""A test harness: disturbs a real supervisor under load with kills, stops, reloads and scaling, and checks
its guarantees."""
