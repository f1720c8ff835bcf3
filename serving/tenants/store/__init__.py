"""The database: schema, migrations, and the SQL of tenants, keys and usage."""
