// Package attest finds out which pod is calling.
//
//	agent ── authorization: Bearer <token> ──► gRPC server
//	                                              │ FromContext: token → Attestor → Pod          (Identity.Sign)
//	                                              └ Guard.Peer:  … → SPIFFE ID = the caller's SVID  (ADS)
//
// A token is bound to one pod (name and UID), to one audience, and ends. In a cluster it is the pod's projected ServiceAccount
// token, checked by TokenReview; in the sandbox a [Minter] makes and checks it. Both stand behind [Attestor].
//
// What goes back to the caller never says why a token was refused; the reason is for the server's log (see [Reason]).
package attest

import (
	"context"
	"errors"
	"fmt"
)

// Audience is the audience of tokens that are meant for Mantlet's control plane.
const Audience = "mantlet"

// ErrRefused is wrapped by an Attestor's error where the token is not one that is valid now. Any other error means that the
// Attestor could not tell.
var ErrRefused = errors.New("token refused")

// ErrUnknownPod is wrapped by a Lookup's error where the pod is not known (yet).
var ErrUnknownPod = errors.New("unknown pod")

// Pod is the pod that a token is bound to. The UID tells it from an earlier or later pod of that name.
type Pod struct {
	Namespace string
	Name      string
	UID       string
}

// String returns "namespace/name".
func (p Pod) String() string { return p.Namespace + "/" + p.Name }

func (p Pod) check() error {
	if p.Namespace == "" || p.Name == "" || p.UID == "" {
		return fmt.Errorf("pod %q with UID %q: namespace, name and UID must all be set", p, p.UID)
	}
	return nil
}

// Attestor tells which pod a token is bound to. It fails closed: a Pod comes back only with a nil error and is then complete.
type Attestor interface {
	Attest(ctx context.Context, token string) (Pod, error)
}
