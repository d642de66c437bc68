package netns

import (
	"net/netip"
	"time"
)

// Speaks says who sends the first bytes of a connection.
type Speaks string

// Who speaks first.
const (
	ClientFirst Speaks = "client" // the client sends a line, the server answers with one
	ServerFirst Speaks = "server" // the server sends a line at once, as databases and mail servers send a banner
)

// Port is a port on which a pod's probe server listens.
type Port struct {
	Number uint16 `json:"number"`
	// Protocol is TCP or UDP. Zero: TCP.
	Protocol Protocol `json:"protocol,omitempty"`
	// Speaks is ClientFirst for UDP: nobody is there before the first datagram.
	Speaks Speaks `json:"speaks"`
	// Bind is the only address that it listens on, for example 127.0.0.1. Zero: on 0.0.0.0 and [::].
	Bind netip.Addr `json:"bind"`
}

// Target is one connection, or one exchange of datagrams, to try.
type Target struct {
	Addr netip.AddrPort `json:"addr"`
	// Protocol is TCP or UDP. Zero: TCP.
	Protocol Protocol `json:"protocol,omitempty"`
	Speaks   Speaks   `json:"speaks"`
	// Nonce is what a client-first probe sends, one line; the answer has to repeat it. Datagrams need one that nobody else has.
	Nonce string `json:"nonce,omitempty"`
	// From is the client's address. Zero: the kernel chooses. Outside: any address of the CIDR.
	From netip.Addr `json:"from"`
	// Timeout bounds the whole try. Zero: Config.ProbeTimeout.
	Timeout time.Duration `json:"timeout,omitempty"`
	// Hold keeps the connection open for so long after the answer, which is an error if the other end closes it meanwhile. TCP only.
	Hold time.Duration `json:"hold,omitempty"`
}

// Texts of Outcome.Connect and Outcome.Err that are no errno's.
const (
	Connected = "ok"       // connect() succeeded
	TimedOut  = "timeout"  // neither answer nor refusal within the time
	Closed    = "EOF"      // the other end closed in an orderly way
	Canceled  = "canceled" // the caller's context ended
)

// The errno texts that a denial usually has. NotPermitted is what the sender's own packet filter says of a datagram; the others come
// from elsewhere, by RST or ICMP.
const (
	Refused      = "connection refused"
	Reset        = "connection reset by peer"
	NotPermitted = "operation not permitted"
	Unreachable  = "no route to host"
	NoNetwork    = "network is unreachable"
)

// Outcome is what one try met with. Connect tells what connect() said, Bytes and Reached what came of it: the two differ where
// a proxy accepts on somebody's behalf, and for UDP always, as connect() asks nobody there.
type Outcome struct {
	Target Target `json:"target"`
	// Connect is Connected, TimedOut, Canceled or the errno's text.
	Connect string `json:"connect"`
	// Reached is the pod and port that answered, for example "shop/db-0:5432". Empty: nobody did.
	Reached string `json:"reached,omitempty"`
	// Seen is the client's address as the server saw it.
	Seen netip.AddrPort `json:"seen"`
	// Bytes that arrived, an answer's or not.
	Bytes int `json:"bytes"`
	// Err is what ended the connection before a whole answer (or before the end of Hold): Closed, Reset, TimedOut, … Empty: all went well.
	Err     string        `json:"err,omitempty"`
	Elapsed time.Duration `json:"elapsed"`
}

// Connections counts what a probe server has accepted on one port from one address since it started.
type Connections struct {
	Port  uint16     `json:"port"`
	From  netip.Addr `json:"from"`
	Count int        `json:"count"`
}

// Arrival is a datagram of a probe that a probe server has received.
type Arrival struct {
	Nonce string         `json:"nonce"`
	Port  uint16         `json:"port"`
	From  netip.AddrPort `json:"from"`
}

// Arrivals are the datagrams of probes that have reached a probe server since it was last asked.
type Arrivals struct {
	Datagrams []Arrival `json:"datagrams,omitempty"` // in the order of their arrival; a nonce as often as it came
	// Lost counts datagrams that found their socket full: that a nonce is not among Datagrams proves nothing then.
	Lost int `json:"lost,omitempty"`
}

// Answer is the line, JSON, that a probe server sends.
type Answer struct {
	Pod   string         `json:"pod"`
	Port  uint16         `json:"port"`
	Nonce string         `json:"nonce,omitempty"`
	Seen  netip.AddrPort `json:"seen"`
}

// A request to the probe process of a pod and its reply, JSON over a socket pair. Exactly one of the pointers is set.
type (
	request struct {
		ID          int64          `json:"id"`
		Serve       *serveRequest  `json:"serve,omitempty"` // the first one
		Probe       *probeRequest  `json:"probe,omitempty"`
		Connections *struct{}      `json:"connections,omitempty"`
		Arrivals    *struct{}      `json:"arrivals,omitempty"`
		Cancel      *cancelRequest `json:"cancel,omitempty"` // has no reply
	}
	serveRequest struct {
		Name  string `json:"name"`
		Ports []Port `json:"ports"`
	}
	probeRequest struct {
		Targets  []Target      `json:"targets"`
		InFlight int           `json:"inFlight"`
		Timeout  time.Duration `json:"timeout"`
	}
	cancelRequest struct {
		ID int64 `json:"id"`
	}
	reply struct {
		ID          int64         `json:"id"`
		Outcomes    []Outcome     `json:"outcomes,omitempty"`
		Connections []Connections `json:"connections,omitempty"`
		Arrivals    *Arrivals     `json:"arrivals,omitempty"`
		Error       string        `json:"error,omitempty"`
	}
)
