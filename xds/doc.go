// Package xds renders verdicts as Envoy resources. It is pure: equal input gives equal messages, lists sorted.
//
//	                ┌──────────── inbound :15006 ───────────┐      ┌──── gate (internal) ────┐
//	peer ── TLS, ───► mtls:  rbac (ECDS), peer_id = SAN ──── to-gate ─► port → peer → address ├─► allow ─► app (ORIGINAL_DST)
//	       ALPN     │                                       │      │                         └─► deny ──► (no endpoints)
//	     ── else ───► plain: peer_id = "plaintext" ───────── to-gate ─►
//	     ── own node ► node ───────────────────────────────────────────────────────────────────────────► app
//	     ── :15001/6 ► blackhole
//
//	app ──► outbound :15001 ── cluster CIDRs ──► mesh: od|IP:PORT on demand, mTLS to exactly the expected SAN
//	                        ├─ own node ───────► passthrough
//	                        ├─ loopback ───────► blackhole
//	                        └─ else: egress verdicts by address ─► passthrough or deny
//
// The gate decides at accept: a denied peer gets no byte and the app sees no connection, also where the server speaks first
// (Envoy's network RBAC alone would decide at the client's first byte only). The rbac filter says the same once more of the
// identity in the TLS session itself, as a second lock.
//
// Whatever a matcher does not list is denied by an on_no_match that is always written out: in Envoy an absent one means "no
// match", an RBAC filter without rules allows everything, and an empty exact map is refused.
//
// TLS sessions are resumed, unless Resumption says otherwise. Envoy checks no expiry on resumption; the agents bound the overrun.
package xds
