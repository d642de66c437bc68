// Package authority keeps Mantlet's certificate authority in a Kubernetes cluster: its root in a Secret, which all replicas of the control
// plane share, and what agents begin with, the trust bundle, in a ConfigMap of every namespace.
//
//	Secret ──Open──► ca.CA ◄──Follow── Secret, when somebody takes the next step of a rotation
//	                   │
//	                   └──Publish──► ConfigMap mantlet-root in every namespace
//
// The first replica ever makes the root. Of several that start at once the API server lets one create the Secret; the others take what is
// there then. Where the Secret is deleted whoever is first makes it anew: a running replica with the root in force, or one that just starts with a
// new root. Then those that run stop, and start again with what is in the Secret, so that there is one root in the end (follow.go).
package authority

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"github.com/mantlet/mantlet/identity/ca"
)

// rootsKey is where a Secret of type kubernetes.io/tls has the roots, as cert-manager writes it.
const rootsKey = "ca.crt"

// ErrUnusable is wrapped by Open's error where the Secret is there and holds no authority: to try again does not help.
var ErrUnusable = errors.New("unusable authority")

// Secret is the Secret with the authority's key, chain and roots (ca.Material), of type kubernetes.io/tls.
type Secret struct {
	Client kubernetes.Interface
	Name   types.NamespacedName
	Log    *slog.Logger
}

// Open loads the authority from the Secret, or makes one and the Secret with it where there is none. A Secret that holds no usable authority is an
// error, and stays as it is.
func (s Secret) Open(ctx context.Context, cfg ca.Config) (*ca.CA, error) {
	api := s.Client.CoreV1().Secrets(s.Name.Namespace)
	is, err := api.Get(ctx, s.Name.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		var made *ca.CA
		if made, err = ca.New(cfg); err != nil {
			return nil, err
		}
		err = s.create(ctx, made)
		if err == nil {
			s.Log.Info("a new root was made", "secret", s.Name, "trust_domain", cfg.TrustDomain)
			return made, nil
		}
		if apierrors.IsAlreadyExists(err) { // by another replica, a moment ago
			is, err = api.Get(ctx, s.Name.Name, metav1.GetOptions{})
		}
	}
	if err != nil {
		return nil, fmt.Errorf("secret %s: %w", s.Name, err)
	}
	loaded, err := ca.Load(cfg, material(is))
	if err != nil {
		return nil, fmt.Errorf("%w: secret %s: %w\n  hint: put an ECDSA key, its certificate and the trusted roots into %s, %s and %s; if the secret is deleted a new root is made, and every sidecar has to start anew",
			ErrUnusable, s.Name, err, corev1.TLSPrivateKeyKey, corev1.TLSCertKey, rootsKey)
	}
	return loaded, nil
}

func (s Secret) create(ctx context.Context, authority *ca.CA) error {
	m, err := authority.Material()
	if err != nil {
		return err
	}
	_, err = s.Client.CoreV1().Secrets(s.Name.Namespace).Create(ctx, &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: s.Name.Namespace, Name: s.Name.Name},
		Type:       corev1.SecretTypeTLS,
		Data:       map[string][]byte{corev1.TLSPrivateKeyKey: m.Key, corev1.TLSCertKey: m.Chain, rootsKey: m.Roots},
	}, metav1.CreateOptions{})
	return err
}

func material(s *corev1.Secret) ca.Material {
	return ca.Material{Key: s.Data[corev1.TLSPrivateKeyKey], Chain: s.Data[corev1.TLSCertKey], Roots: s.Data[rootsKey]}
}
