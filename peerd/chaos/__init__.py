"""Drives a real supervisor with kills, stops, reloads and scaling under load, and checks what it promises."""
