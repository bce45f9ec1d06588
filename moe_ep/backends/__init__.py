"""The backends: tokenspeed's interface around one implementation each."""
