"""Simulates steps of many ranks, event by event: what closed forms can't say, such as what one slow rank costs."""
