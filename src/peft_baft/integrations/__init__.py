"""Integration with other software: the Hub, evaluation harnesses, and other adapter formats."""
