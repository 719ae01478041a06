"""Comparing engines that speak OpenAI's API: the same load on each, ratios with their uncertainty, one report."""
