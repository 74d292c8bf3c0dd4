"""What comes from outside: data files, prompt sets, model folders and the hub, and texts as token ids.

What identifies them in an artifact's id is here too. Imports no other group of modules; ``readers`` has the formats of
rows.
"""
