// Package relay carries a pod's delta ADS stream between its Envoy and the control plane, and watches what Envoy makes of it.
//
//	Envoy ──requests──► relay ──the same bytes, mTLS + token──► control plane
//	      ◄─responses──   │   ◄───────────────────────────────
//	                      ├─► Ledger: per type, which resources Envoy holds; a NACK is logged
//	                      └─► Own: the agent's resource, subscribed to and answered beside Envoy's, and kept from it
//
// Messages go through as they are; of their envelopes only names, nonces and errors are read, and Envoy's resources not at all. Nothing is
// queued: a side that does not read holds up the other, by gRPC's flow control.
//
// When the control plane's stream ends, Envoy's is ended too. Envoy keeps what it has, comes back and says what it holds
// (initial_resource_versions), so that only what changed is sent again. The relay waits, longer each time, before it goes back to a
// control plane that answered nothing.
package relay
