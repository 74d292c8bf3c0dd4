"""Grid items: many small runs of conditions, arms, settings and seeds, and what is read off them."""
