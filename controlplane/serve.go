package controlplane

import (
	"context"
	"net/netip"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/mantlet/mantlet/identity/attest"
	"github.com/mantlet/mantlet/identity/ca"
	"github.com/mantlet/mantlet/identity/signing"
	"github.com/mantlet/mantlet/xds/server"
)

// NewServer returns a gRPC server that serves a new ControlPlane: SVIDs to attested pods, and configuration to sidecars that show
// the SVID and the token of one and the same pod. addrs are the addresses that agents dial.
func NewServer(c Config, authority *ca.CA, attestor attest.Attestor, sc server.Config, addrs []netip.Addr) (*ControlPlane, *grpc.Server, error) {
	auth := &authenticator{}
	sc.Authenticator = auth
	if c.SVIDTTL == 0 {
		c.SVIDTTL = authority.TTL()
	}
	cp, err := New(c, sc)
	if err != nil {
		return nil, nil, err
	}
	auth.guard = attest.Guard{Attestor: attestor, Lookup: cp.Identity, Bundle: authority, Differs: cp.shown}
	own, err := authority.NewServer(nil, addrs)
	if err != nil {
		return nil, nil, err
	}
	g := grpc.NewServer(append(server.ServerOptions(), grpc.Creds(credentials.NewTLS(signing.ServerTLS(own, authority))))...)
	cp.authority = authority
	identities := signing.New(attestor, cp.Identity, authority, cp.log)
	identities.OnSigned(cp.note)
	identities.Await(cp.recorded)
	identities.Register(g)
	cp.xds.Register(g)
	return cp, g, nil
}

// authenticator names a stream after the pod that both its SVID and its token belong to.
type authenticator struct{ guard attest.Guard }

func (a *authenticator) Authenticate(ctx context.Context) (server.Client, error) {
	pod, _, err := a.guard.Peer(ctx)
	if err != nil {
		return "", attest.Reason(err) // the server logs it; the client is told nothing
	}
	return server.Client(pod.String()), nil
}
