// Package server serves delta ADS and keeps the ledger of what each sidecar acknowledged.
package server
