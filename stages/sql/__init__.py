"""Text-to-SQL without a model: a schema, a query's normal form, filled instances, safe execution, comparison."""
