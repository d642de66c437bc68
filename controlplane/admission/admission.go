// Package admission runs a replica's admission webhooks: the certificate from the replica's authority, the authority's roots in the webhook
// configurations, and the server. Every replica runs it; all of them have the same authority.
package admission

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"

	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/kubernetes"

	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/controlplane/inject/webhook"
	"github.com/mantlet/mantlet/controlplane/settings"
	"github.com/mantlet/mantlet/identity/ca"
)

// Config says what to run. All fields but Leaving are required.
type Config struct {
	Settings  *settings.Settings
	Client    kubernetes.Interface // not held to client-go's default of 5 requests a second: each pod that is created takes one
	Authority *ca.CA               // signs the certificate; its roots are what the API server is told to trust
	Listener  net.Listener         // Run closes it
	Leaving   <-chan struct{}      // see webhook.Config
	Log       *slog.Logger
}

// Run answers the API server until ctx ends; requests that are under way then are finished.
func Run(ctx context.Context, c Config) error {
	if c.Settings == nil || c.Client == nil || c.Authority == nil || c.Listener == nil || c.Log == nil {
		return errors.New("admission: all fields but leaving must be set")
	}
	cfg, err := c.Settings.Inject()
	if err != nil {
		return fmt.Errorf("admission: %w", err)
	}
	if td := c.Authority.TrustDomain(); cfg.TrustDomain != td {
		return fmt.Errorf("admission: sidecars would be told trust domain %q, and the authority signs for %q", cfg.TrustDomain, td)
	}
	cert, err := c.Authority.NewServer([]string{c.Settings.Host()}, nil)
	if err != nil {
		return fmt.Errorf("admission: %w", err)
	}
	server, err := webhook.New(webhook.Config{Inject: cfg, Namespaces: c.Client.CoreV1().Namespaces(), Certificate: cert, Leaving: c.Leaving, Logger: c.Log})
	if err != nil {
		return err
	}
	api := c.Client.AdmissionregistrationV1()
	bundle := webhook.Bundle{
		Name: names.WebhookConfiguration, Mutating: api.MutatingWebhookConfigurations(), Validating: api.ValidatingWebhookConfigurations(), Logger: c.Log,
		Roots: func() ([]byte, error) { m, err := c.Authority.Material(); return m.Roots, err },
	}
	parts, ctx := errgroup.WithContext(ctx)
	parts.Go(func() error { return server.Serve(ctx, c.Listener) })
	parts.Go(func() error { return bundle.Run(ctx) })
	return parts.Wait()
}
