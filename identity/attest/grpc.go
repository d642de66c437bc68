package attest

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// maxToken is far above any ServiceAccount token (1 to 2 KB).
const maxToken = 16 << 10

// Lookup finds the identity of a pod. Its error wraps ErrUnknownPod where the pod is not known (yet).
type Lookup func(Pod) (spiffeid.ID, error)

// Bearer sends a pod's token with every call, and only over TLS. The source is asked each time, because tokens rotate.
func Bearer(token func() (string, error)) credentials.PerRPCCredentials { return bearer(token) }

type bearer func() (string, error)

func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	token, err := b()
	if err != nil {
		return nil, status.Errorf(codes.Unavailable, "token of this pod: %v", err)
	}
	if token = strings.TrimSpace(token); token == "" {
		return nil, status.Error(codes.Unavailable, "token of this pod: empty")
	}
	return map[string]string{"authorization": "Bearer " + token}, nil
}

func (bearer) RequireTransportSecurity() bool { return true }

// FromContext tells which pod made a gRPC call, by the bearer token in its metadata. The error is a gRPC status to be returned
// as it is, Unauthenticated or Unavailable; Reason has the rest of it.
func FromContext(ctx context.Context, a Attestor) (Pod, error) {
	token, err := bearerToken(ctx)
	if err != nil {
		return Pod{}, refuse(codes.Unauthenticated, "a bearer token in the metadata is required", err)
	}
	pod, err := a.Attest(ctx, token)
	switch {
	case errors.Is(err, ErrRefused):
		return Pod{}, refuse(codes.Unauthenticated, "token refused", err)
	case err != nil && ctx.Err() != nil:
		return Pod{}, refuse(status.FromContextError(ctx.Err()).Code(), "the call ended first", err)
	case err != nil:
		return Pod{}, refuse(codes.Unavailable, "the token cannot be checked now", err)
	}
	if err := pod.check(); err != nil {
		return Pod{}, refuse(codes.Unauthenticated, "token refused", err)
	}
	return pod, nil
}

func bearerToken(ctx context.Context) (string, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	values := md.Get("authorization")
	if len(values) != 1 {
		return "", fmt.Errorf("%d authorization values in the metadata", len(values))
	}
	scheme, token, _ := strings.Cut(values[0], " ")
	switch {
	case !strings.EqualFold(scheme, "bearer"):
		return "", errors.New("the authorization is not of the form \"Bearer TOKEN\"")
	case token == "":
		return "", errors.New("the token is empty")
	case len(token) > maxToken:
		return "", fmt.Errorf("a token of %d bytes; at most %d are accepted", len(token), maxToken)
	}
	return token, nil
}

// Resolve is FromContext with the identity of the pod: NotFound while the pod is unknown, PermissionDenied where it has none.
func Resolve(ctx context.Context, a Attestor, lookup Lookup) (Pod, spiffeid.ID, error) {
	pod, err := FromContext(ctx, a)
	if err != nil {
		return Pod{}, spiffeid.ID{}, err
	}
	id, err := lookup(pod)
	switch {
	case errors.Is(err, ErrUnknownPod):
		return Pod{}, spiffeid.ID{}, refuse(codes.NotFound, "the control plane does not know this pod", fmt.Errorf("pod %s: %w", pod, err))
	case err != nil:
		return Pod{}, spiffeid.ID{}, refuse(codes.PermissionDenied, "this pod has no identity", fmt.Errorf("pod %s: %w", pod, err))
	case id.IsZero():
		return Pod{}, spiffeid.ID{}, refuse(codes.PermissionDenied, "this pod has no identity", fmt.Errorf("pod %s: the lookup gave none", pod))
	}
	return pod, id, nil
}

// Guard authenticates callers that must show both an X.509-SVID and a token, as the ADS stream must: a stolen token is worth
// nothing without the key, and an SVID, which all replicas share in name, does not say which pod it is.
type Guard struct {
	Attestor Attestor
	Lookup   Lookup
	Bundle   x509bundle.Source
	Now      func() time.Time // nil: time.Now
	// Differs, if set, is told of a pod that is refused for showing a valid X.509-SVID of another identity than its own.
	Differs func(Pod, *x509.Certificate)
}

// Peer tells which pod made a gRPC call, and its identity, which is both that of the token's pod and that of the X.509-SVID of
// the call's TLS connection. The certificate is verified here, whatever the TLS configuration did: a long-lived connection may
// have outlived it. The error is a gRPC status to be returned as it is; Reason has the rest of it.
func (g *Guard) Peer(ctx context.Context) (Pod, spiffeid.ID, error) {
	presented, leaf, err := g.svid(ctx)
	if err != nil {
		return Pod{}, spiffeid.ID{}, refuse(codes.Unauthenticated, "a valid X.509-SVID is required", err)
	}
	pod, id, err := Resolve(ctx, g.Attestor, g.Lookup)
	if err != nil {
		return Pod{}, spiffeid.ID{}, err
	}
	if presented != id {
		if g.Differs != nil {
			g.Differs(pod, leaf)
		}
		return Pod{}, spiffeid.ID{}, refuse(codes.PermissionDenied, "the X.509-SVID is not that of the token's pod; renew it",
			fmt.Errorf("pod %s is %s and presented %s", pod, id, presented))
	}
	return pod, id, nil
}

func (g *Guard) svid(ctx context.Context) (spiffeid.ID, *x509.Certificate, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return spiffeid.ID{}, nil, errors.New("no peer in the context")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return spiffeid.ID{}, nil, fmt.Errorf("no TLS on the connection (%T)", p.AuthInfo)
	}
	now := time.Now
	if g.Now != nil {
		now = g.Now
	}
	id, _, err := x509svid.Verify(info.State.PeerCertificates, g.Bundle, x509svid.WithTime(now()))
	if err != nil {
		return spiffeid.ID{}, nil, err
	}
	return id, info.State.PeerCertificates[0], nil
}

// refusal is a gRPC status whose reason stays on this side.
type refusal struct {
	public *status.Status
	reason error
}

func refuse(code codes.Code, public string, reason error) error {
	return &refusal{public: status.New(code, public), reason: reason}
}

// Error gives the public text only: gRPC sends the text of a wrapping error to the caller.
func (r *refusal) Error() string { return r.public.Message() }

// GRPCStatus is what the caller gets.
func (r *refusal) GRPCStatus() *status.Status { return r.public }

// Reason returns why a call was refused, for the server's log; never send it to the caller.
func Reason(err error) error {
	var r *refusal
	if errors.As(err, &r) {
		return r.reason
	}
	return err
}
