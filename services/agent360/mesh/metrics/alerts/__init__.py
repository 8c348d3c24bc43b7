"""Alerts: rules evaluated over time, the states of their alerts, silences and notifications."""
