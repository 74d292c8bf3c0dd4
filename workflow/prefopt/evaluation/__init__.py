"""Statistics of what has been judged and measured: length control, comparisons of policies, rankings, verdicts.

Functions of tables and arrays, without torch; ``prefopt.judging`` and ``prefopt.winrate`` come before. Imports no other
group of modules.
"""
