package flows

import (
	"net/netip"
	"time"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"

	"github.com/mantlet/mantlet/xds/names"
)

// Connection is one that Envoy has let pass, at the moment at which it reaches the app or has left the pod.
type Connection struct {
	Direction Direction
	Began     time.Time
	// Peer is what is known of who is at the other end: a SPIFFE ID, names.Plaintext, or "" where no pod has the address. Inbound it is what
	// mTLS proved; outbound it is whose address it is, by the control plane's word.
	Peer string
	// Authenticated says that Peer was proved, by mTLS.
	Authenticated bool
	// Always says that policy has no say: the pod itself or its own node.
	Always bool
	// Source and Destination are the ends as the client meant them.
	Source, Destination netip.AddrPort
	// Local and Remote are the ends of Envoy's own connection onward: inbound to the app, outbound to wherever the load balancing led.
	Local, Remote netip.AddrPort
	Cluster       string // as in Record
}

// Observer is told of connections while they are open.
type Observer interface {
	// Opened is called about a millisecond after the connection came about.
	Opened(Connection)
	// Closed is called when Envoy is done with some, up to 100 ms later; their sockets may stay a while longer, until what was sent has arrived.
	// The list is the receiver's, for the time of the call.
	Closed([]End)
}

// End is the end of a connection that was told of, or is about to be.
type End struct {
	Began         time.Time
	Local, Remote netip.AddrPort // as in Connection
}

// Observe has an Observer told of connections. Its methods are called by several goroutines; beginnings and ends come by streams of
// their own, so that of a very short connection the end may be told first. It is for before [Receiver.Register].
func (r *Receiver) Observe(o Observer) { r.observer = o }

// observe hands on an entry of names.LogOpen.
func (r *Receiver) observe(e *accesslogv3.TCPAccessLogEntry) {
	if r.observer == nil {
		return
	}
	r.observer.Opened(connectionOf(e))
}

// appendEnd adds the end of a connection that a record tells of. One that never came about has none.
func appendEnd(ends []End, rec *Record) []End {
	if !rec.UpstreamLocal.IsValid() || !rec.UpstreamRemote.IsValid() {
		return ends
	}
	return append(ends, End{Began: rec.Time, Local: rec.UpstreamLocal, Remote: rec.UpstreamRemote})
}

func connectionOf(e *accesslogv3.TCPAccessLogEntry) Connection {
	p := e.GetCommonProperties()
	tags := p.GetCustomTags()
	c := Connection{
		Direction:   Outbound,
		Began:       p.GetStartTime().AsTime(),
		Always:      tags[names.TagAlways] == names.AlwaysAllowed,
		Source:      addrPort(p.GetDownstreamRemoteAddress()),
		Destination: addrPort(p.GetDownstreamLocalAddress()),
		Local:       addrPort(p.GetUpstreamLocalAddress()),
		Remote:      addrPort(p.GetUpstreamRemoteAddress()),
		Cluster:     p.GetUpstreamCluster(),
	}
	if c.Cluster == names.ClusterApp {
		c.Direction = Inbound
		c.Peer = text(p.GetFilterStateObjects()[names.PeerID])
		c.Authenticated = spiffe(c.Peer)
		return c
	}
	if spiffe(tags[names.TagPeer]) {
		c.Peer = tags[names.TagPeer]
		c.Authenticated = spiffe(tags[names.TagProof])
	}
	return c
}
