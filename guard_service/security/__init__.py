"""Who may call and for how much: certificates, credentials, tenants, quotas, signatures."""
