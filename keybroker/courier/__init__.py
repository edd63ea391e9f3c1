"""The room that tells approvers: it carries signed notices to webhooks. It decides nothing, signs nothing and knows no key."""
