package webhook

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/controlplane/inject"
)

// Paths of the webhooks, as the webhook configurations name them, and of the probe.
const (
	PathInject    = "/inject"
	PathVerify    = "/verify"
	PathEphemeral = "/ephemeral"
	PathPolicy    = "/policy"
	PathHealth    = "/healthz"
)

// Namespaces reads namespaces from the API server, live; client-go's NamespaceInterface does.
type Namespaces interface {
	Get(ctx context.Context, name string, opts metav1.GetOptions) (*corev1.Namespace, error)
}

// Config configures a Server. All fields but Leaving are required.
type Config struct {
	Inject     inject.Config
	Namespaces Namespaces // its client should not be held to client-go's default of 5 requests a second: each pod takes one
	// Certificate is the server's, with the DNS name of its Service among the names; *ca.Server is one. It is asked for at every
	// handshake, so that it may renew.
	Certificate x509svid.Source
	// Leaving is closed when the API server is to go elsewhere, some time before Serve's context ends: from then on each answer is the last of its
	// connection. API servers keep connections, and those stay with the replica that they were opened to (kube-proxy leaves what is established alone);
	// one that is closed while a request is on its way would be an admission that fails, which they do not try again. nil: never.
	Leaving <-chan struct{}
	Logger  *slog.Logger
}

// Server answers the API server.
type Server struct {
	cfg        inject.Config
	namespaces Namespaces
	cert       x509svid.Source
	leaving    <-chan struct{}
	log        *slog.Logger
	budget     budget
}

// New checks the configuration.
func New(cfg Config) (*Server, error) {
	if cfg.Namespaces == nil || cfg.Certificate == nil || cfg.Logger == nil {
		return nil, errors.New("webhook: namespaces, certificate and logger must be set")
	}
	if err := cfg.Inject.Check(); err != nil {
		return nil, err
	}
	return &Server{cfg: cfg.Inject, namespaces: cfg.Namespaces, cert: cfg.Certificate, leaving: cfg.Leaving, log: cfg.Logger}, nil
}

// Handler serves the paths, without TLS.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle(PathInject, s.handler(podLoad, s.inject))
	mux.Handle(PathVerify, s.handler(podLoad, s.verify))
	mux.Handle(PathEphemeral, s.handler(podLoad, s.ephemeral))
	mux.Handle(PathPolicy, s.handler(policyLoad, s.policy))
	mux.HandleFunc("GET "+PathHealth, func(w http.ResponseWriter, _ *http.Request) { _, _ = fmt.Fprintln(w, "ok") })
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-s.leaving:
			w.Header().Set("Connection", "close")
		default:
		}
		mux.ServeHTTP(w, r)
	})
}

// stopGrace is how long requests that are under way may take at the end.
const stopGrace = 5 * time.Second

// Serve answers on a listener, over TLS, until ctx ends; what is under way then is finished. It closes the listener.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	return s.serve(ctx, l, s.Handler())
}

func (s *Server) serve(ctx context.Context, l net.Listener, h http.Handler) error {
	server := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       15 * time.Second, // a webhook's own timeout is at most 30 s, and ours 10 s
		MaxHeaderBytes:    16 << 10,
		IdleTimeout:       2 * time.Minute,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		TLSConfig: &tls.Config{
			MinVersion: tls.VersionTLS12, // what API servers speak
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
				svid, err := s.cert.GetX509SVID()
				if err != nil {
					return nil, err
				}
				c := &tls.Certificate{PrivateKey: svid.PrivateKey, Leaf: svid.Certificates[0]}
				for _, cert := range svid.Certificates {
					c.Certificate = append(c.Certificate, cert.Raw)
				}
				return c, nil
			},
		},
	}
	stopped := make(chan error, 1)
	served, done := context.WithCancel(ctx)
	defer done()
	go func() {
		<-served.Done()
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopGrace)
		defer cancel()
		stopped <- server.Shutdown(grace)
	}()
	err := server.ServeTLS(l, "", "")
	done()
	if shut := <-stopped; errors.Is(err, http.ErrServerClosed) {
		return shut
	}
	return fmt.Errorf("webhook: %w", err)
}
