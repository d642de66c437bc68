// Package flows receives Envoy's access logs and writes them down as flow records: who talked to whom, and whether it was let.
//
//	Envoy ──TcpLogs (gRPC access log service)──► Receiver ──queue──► Run ──JSON lines──► io.Writer
//	                                                │
//	                                                └─ queue full: dropped, counted, logged; Envoy never waits
//
// A connection makes one record at each end that has a sidecar, when it ends: an outbound one at its source and an inbound one at its
// destination. (Envoy logs an inbound connection twice, at the capture and at the gate. The gate knows the verdict; what the capture
// logs of a connection that it handed to the gate is left out.) Beside this an Observer is told of each connection when it begins, and the
// agent adds a record for each that it cuts.
package flows

import (
	"net/netip"
	"time"
)

// Direction of a connection as the pod sees it.
type Direction string

// The directions.
const (
	Inbound  Direction = "inbound"  // to the pod
	Outbound Direction = "outbound" // from the pod
)

// Verdict on a connection.
type Verdict string

// The verdicts. The rules by which they are read from Envoy's log are at verdictOf.
const (
	Allowed Verdict = "allowed" // let through, and the other side accepted
	Denied  Verdict = "denied"  // refused by policy, or by what stands in for it: no proof of identity, a capture port called directly
	Failed  Verdict = "failed"  // not refused by policy, but no connection came about
	// Revoked: let through, and cut because policy allows it no longer. It is written at that moment, beside what is written at the end.
	Revoked Verdict = "revoked"
)

// Record is one connection. Its JSON form is stable: fields may be added, none is renamed, and what is absent was not known.
type Record struct {
	Time      time.Time `json:"time"`      // when the connection began
	Log       string    `json:"log"`       // which log told of it: a names.Log…
	Direction Direction `json:"direction"` // as the pod sees it
	Verdict   Verdict   `json:"verdict"`
	// Self is the SPIFFE ID of the pod that writes the record.
	Self string `json:"self,omitempty"`
	// Peer is the SPIFFE ID at the other end: inbound as it was proved, outbound as the control plane says whose address it is. It is empty
	// for a peer without one, and for a denied outbound connection, which has no other end.
	Peer string `json:"peer,omitempty"`
	// Authenticated says that Peer was proved, by mTLS.
	Authenticated bool `json:"authenticated"`
	// Policy ("namespace/name"), Rule and Reason say why a connection was revoked.
	Policy string `json:"policy,omitempty"`
	Rule   string `json:"rule,omitempty"`
	Reason string `json:"reason,omitempty"`
	// Source and Destination are the ends as the client meant them, before any redirect: Destination is the address that it
	// dialled, which for an outbound connection may be a Service's.
	Source      netip.AddrPort `json:"source"`
	Destination netip.AddrPort `json:"destination"`
	// UpstreamLocal and UpstreamRemote are the ends of Envoy's own connection onward; inbound, to the app. Invalid ("") where
	// there was none.
	UpstreamLocal  netip.AddrPort `json:"upstreamLocal"`
	UpstreamRemote netip.AddrPort `json:"upstreamRemote"`
	// Cluster is Envoy's name for where the connection was to go on to: a names.Cluster…, or "od|IP:PORT".
	Cluster string `json:"cluster,omitempty"`
	// Flags are Envoy's response flags in their short form, such as "UF" (upstream connection failure) or "UH" (no healthy upstream).
	Flags []string `json:"flags,omitempty"`
	// BytesReceived came from the side that opened the connection, BytesSent went to it.
	BytesReceived uint64 `json:"bytesReceived"`
	BytesSent     uint64 `json:"bytesSent"`
	// DurationSeconds is how long the connection lived.
	DurationSeconds float64 `json:"durationSeconds"`
	// Termination says why Envoy closed the connection, where it was Envoy that did.
	Termination string `json:"termination,omitempty"`
	// TransportFailure says why TLS failed, in BoringSSL's words: inbound with the peer, outbound with the destination.
	TransportFailure string `json:"transportFailure,omitempty"`
	// TLS is about the connection that came in; absent in plaintext.
	TLS *TLS `json:"tls,omitempty"`
}

// TLS describes a TLS session.
type TLS struct {
	Version   string   `json:"version,omitempty"`   // "TLSv1.3"
	PeerSANs  []string `json:"peerSANs,omitempty"`  // URI SANs of the peer's certificate
	LocalSANs []string `json:"localSANs,omitempty"` // of the own
}
