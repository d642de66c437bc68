package cluster

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/mantlet/mantlet/test/cluster/binaries"
)

// APIServerOptions say what StartAPIServer starts. The zero value is usable.
type APIServerOptions struct {
	// Directory gets etcd's data, keys and logs, and is made if it is not there. Empty: a temporary one, which Stop removes.
	Directory string
	// DisableAdmission names admission plugins that are on by default and are to be off, as kube-apiserver's
	// --disable-admission-plugins does: PodSecurity, for example. ServiceAccount is off in any case: without a controller manager no
	// namespace has a default service account, and no pod could be created.
	DisableAdmission []string
	// Flags are given to kube-apiserver after the others: of two with one name, the last counts.
	Flags []string
	// Log hears of builds of binaries. Nil: nobody does.
	Log *slog.Logger
}

// APIServer is an etcd and a kube-apiserver. Nothing else runs: no controller, no scheduler, no node. Both end with this process, however it
// ends.
type APIServer struct {
	directory string
	temporary bool
	host      netip.Addr
	authority *authority
	binary    string
	flags     []string
	etcd      *process
	server    *process
	client    *http.Client
}

// Issuer is that of service account tokens, and the audience that they have when none is asked for.
const Issuer = "https://kubernetes.default.svc.cluster.local"

const (
	apiPort      = 6443
	etcdPort     = 2379
	etcdPeerPort = 2380
)

// StartAPIServer returns when /readyz says yes: in about three seconds, once the binaries are built. What it started it has stopped again if it
// fails. Any number can run at once: each has a loopback address of its own.
func StartAPIServer(ctx context.Context, o APIServerOptions) (_ *APIServer, err error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	etcd, err := binaries.Path(ctx, o.Log, "etcd")
	if err != nil {
		return nil, err
	}
	s := &APIServer{directory: o.Directory}
	if s.binary, err = binaries.Path(ctx, o.Log, "kube-apiserver"); err != nil {
		return nil, err
	}
	if s.host, err = freeLoopback(); err != nil {
		return nil, err
	}
	if s.directory == "" {
		s.temporary = true
		if s.directory, err = os.MkdirTemp("", "mantlet-apiserver-"); err != nil {
			return nil, err
		}
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Stop())
		}
	}()
	if s.directory, err = filepath.Abs(s.directory); err != nil {
		return nil, err
	}
	if s.authority, err = newAuthority(filepath.Join(s.directory, "pki"), fmt.Sprintf("https://%s", netip.AddrPortFrom(s.host, apiPort))); err != nil {
		return nil, err
	}
	if err := s.issue(); err != nil {
		return nil, err
	}
	if s.etcd, err = startChild(filepath.Join(s.directory, "etcd.log"), etcd, etcdFlags(filepath.Join(s.directory, "etcd"), s.host)...); err != nil {
		return nil, err
	}
	s.flags = apiServerFlags(apiServerSettings{
		authority: s.authority, etcd: s.host, bind: s.host, services: "10.96.0.0/16", disable: append([]string{"ServiceAccount"}, o.DisableAdmission...),
	})
	// No endpoint of the kubernetes service is written: the API refuses loopback addresses there.
	s.flags = append(append(s.flags, "--endpoint-reconciler-type=none", "--authorization-mode=RBAC"), o.Flags...)
	return s, s.startServer(ctx)
}

func (s *APIServer) issue() error {
	server := subject{file: "apiserver", user: "kube-apiserver", names: []string{"localhost"}, at: []netip.Addr{s.host}}
	if err := s.authority.issue(server); err != nil {
		return err
	}
	if err := s.authority.client(admin); err != nil {
		return err
	}
	var err error
	s.client, err = s.authority.httpClient(admin.file)
	return err
}

// startServer starts kube-apiserver, which waits for etcd by itself, and waits until it is ready.
func (s *APIServer) startServer(ctx context.Context) error {
	var err error
	if s.server, err = startChild(s.LogFile(), s.binary, s.flags...); err != nil {
		return err
	}
	return s.server.await(ctx, func(ctx context.Context) error { return readyz(ctx, s.client, s.authority.server) })
}

// Kubeconfig is the path of a kubeconfig whose user may do everything. It stays valid after Restart.
func (s *APIServer) Kubeconfig() string { return s.authority.path(admin.file + ".conf") }

// URL is where the server listens: https://127.x.y.z:6443.
func (s *APIServer) URL() string { return s.authority.server }

// LogFile is that of kube-apiserver.
func (s *APIServer) LogFile() string { return filepath.Join(s.directory, "kube-apiserver.log") }

// Shutdown ends the API server as a crash does, and leaves etcd: nobody answers at its address until Restart. In good order it would wait for
// its clients' watches, for up to a minute.
func (s *APIServer) Shutdown() error {
	s.client.CloseIdleConnections()
	return s.server.kill()
}

// Restart ends the API server if it runs, and starts it anew at the same address, with what etcd has.
func (s *APIServer) Restart(ctx context.Context) error {
	return errors.Join(s.Shutdown(), s.startServer(ctx))
}

// Stop ends everything, and removes the directory if it was temporary.
func (s *APIServer) Stop() error {
	if s.client != nil {
		s.client.CloseIdleConnections()
	}
	err := errors.Join(s.server.kill(), s.etcd.stop())
	if s.temporary {
		err = errors.Join(err, os.RemoveAll(s.directory))
	}
	return err
}

// freeLoopback is an address of 127.64.0.0/10 where nobody listens on the server's ports. The ports of 127.0.0.1 are everybody's, and
// one that was free a moment ago may be taken; of an address of one's own, nobody takes them.
func freeLoopback() (netip.Addr, error) {
	var last error
	for range 20 {
		host := netip.AddrFrom4([4]byte{127, byte(64 + rand.IntN(64)), byte(rand.IntN(256)), byte(1 + rand.IntN(254))})
		last = nil
		for _, port := range []uint16{apiPort, etcdPort, etcdPeerPort} {
			l, err := net.Listen("tcp", netip.AddrPortFrom(host, port).String()) //nolint:noctx // does not wait
			if err != nil {
				last = err
				break
			}
			l.Close()
		}
		if last == nil {
			return host, nil
		}
	}
	return netip.Addr{}, fmt.Errorf("find a loopback address for an API server: %w", last)
}

// etcdFlags: what is lost when the machine loses power is no loss here, so it does not wait for disks.
func etcdFlags(data string, host netip.Addr) []string {
	client := "http://" + netip.AddrPortFrom(host, etcdPort).String()
	peer := "http://" + netip.AddrPortFrom(host, etcdPeerPort).String()
	return []string{
		"--name=etcd", "--data-dir=" + data, "--unsafe-no-fsync", "--log-level=warn",
		"--listen-client-urls=" + client, "--advertise-client-urls=" + client,
		"--listen-peer-urls=" + peer, "--initial-advertise-peer-urls=" + peer, "--initial-cluster=etcd=" + peer,
	}
}

// apiServerSettings are what differs between an API server alone and that of a whole cluster.
type apiServerSettings struct {
	authority *authority
	etcd      netip.Addr
	bind      netip.Addr // also where others are told that it is
	services  string     // ranges of cluster IPs, with commas
	disable   []string   // admission plugins
}

func apiServerFlags(s apiServerSettings) []string {
	return []string{
		"--etcd-servers=http://" + netip.AddrPortFrom(s.etcd, etcdPort).String(),
		"--bind-address=" + s.bind.String(), "--advertise-address=" + s.bind.String(), fmt.Sprintf("--secure-port=%d", apiPort),
		"--service-cluster-ip-range=" + s.services,
		"--tls-cert-file=" + s.authority.path("apiserver.crt"), "--tls-private-key-file=" + s.authority.path("apiserver.key"),
		"--client-ca-file=" + s.authority.path("ca.crt"), "--cert-dir=" + s.authority.path("generated"),
		"--service-account-issuer=" + Issuer,
		"--service-account-key-file=" + s.authority.path("sa.pub"), "--service-account-signing-key-file=" + s.authority.path("sa.key"),
		"--disable-admission-plugins=" + strings.Join(s.disable, ","),
		"--allow-privileged=true", "--profiling=false", "--shutdown-delay-duration=0s",
	}
}

// httpClient shows the certificate of a client, and trusts the authority alone.
func (a *authority) httpClient(file string) (*http.Client, error) {
	certificate, err := tls.LoadX509KeyPair(a.path(file+".crt"), a.path(file+".key"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AddCert(a.certificate)
	return &http.Client{
		Timeout:   10 * time.Second,
		Transport: &http.Transport{TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots, Certificates: []tls.Certificate{certificate}}},
	}, nil
}

// readyz asks the API server whether it is ready.
func readyz(ctx context.Context, client *http.Client, server string) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, server+"/readyz", nil)
	if err != nil {
		return err
	}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(io.LimitReader(response.Body, 1<<16))
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("GET /readyz: %s: %s", response.Status, text)
	}
	return err
}
