package webhook

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/controlplane/inject"
	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/identity/ca"
	"github.com/mantlet/mantlet/xds/proxyuser"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const domain = "mantlet.local"

// fixed is a Namespaces.
type fixed map[string]*corev1.Namespace

func (c fixed) Get(_ context.Context, name string, _ metav1.GetOptions) (*corev1.Namespace, error) {
	if ns, ok := c[name]; ok {
		return ns, nil
	}
	return nil, errors.New("no such namespace")
}

func newServer(t testing.TB) (*Server, *ca.CA) {
	t.Helper()
	td := spiffeid.RequireTrustDomainFromString(domain)
	authority, err := ca.New(ca.Config{TrustDomain: td})
	if err != nil {
		t.Fatal(err)
	}
	cert, err := authority.NewServer([]string{"mantlet.mantlet-system.svc"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	shop := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{policy.InjectLabel: "enabled"}}}
	s, err := New(Config{
		Inject:     inject.Config{Image: "registry.example/mantlet@sha256:01", ControlPlane: "mantlet.mantlet-system.svc:15012", TrustDomain: td},
		Namespaces: fixed{"shop": shop, "other": {ObjectMeta: metav1.ObjectMeta{Name: "other"}}}, Certificate: cert, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	return s, authority
}

func review(op admissionv1.Operation, kind, namespace, object string) string {
	b, err := json.Marshal(map[string]any{"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": map[string]any{
		"uid": "u-1", "kind": map[string]string{"version": "v1", "kind": kind}, "namespace": namespace, "operation": op, "object": json.RawMessage(object),
	}})
	if err != nil {
		panic(err)
	}
	return string(b)
}

func post(t testing.TB, s *Server, path, contentType, body string) (int, *admissionv1.AdmissionResponse) {
	t.Helper()
	r := httptest.NewRequest(http.MethodPost, path, strings.NewReader(body))
	r.Header.Set("Content-Type", contentType)
	w := httptest.NewRecorder()
	s.Handler().ServeHTTP(w, r)
	if w.Code != http.StatusOK {
		return w.Code, nil
	}
	var answer admissionv1.AdmissionReview
	if err := json.Unmarshal(w.Body.Bytes(), &answer); err != nil || answer.Response == nil || answer.Response.UID != "u-1" || answer.APIVersion != "admission.k8s.io/v1" {
		t.Fatalf("%s: not an answer: %s (%v)", path, w.Body, err)
	}
	return w.Code, answer.Response
}

const podText = `{"apiVersion":"v1","kind":"Pod","metadata":{"generateName":"web-"},"spec":{"fieldOfTomorrow":{"a":1},"containers":[{"name":"app","image":"x","securityContext":{"runAsUser":1}}]}}`

// Once the API server is to go elsewhere it is answered, and told to come by another connection.
func TestLeaving(t *testing.T) {
	s, _ := newServer(t)
	leaving := make(chan struct{})
	s.leaving = leaving
	server := httptest.NewServer(s.Handler())
	defer server.Close()
	for _, goes := range []bool{false, true} {
		if goes {
			close(leaving)
		}
		answer, err := server.Client().Post(server.URL+PathInject, "application/json", strings.NewReader(review(admissionv1.Create, "Pod", "shop", podText)))
		if err != nil {
			t.Fatal(err)
		}
		if answer.Body.Close(); answer.StatusCode != http.StatusOK || answer.Close != goes {
			t.Errorf("leaving: %v: status %d, last of its connection: %v", goes, answer.StatusCode, answer.Close)
		}
	}
}

func TestInject(t *testing.T) {
	s, _ := newServer(t)
	_, answer := post(t, s, PathInject, "application/json", review(admissionv1.Create, "Pod", "shop", podText))
	if !answer.Allowed || answer.PatchType == nil || *answer.PatchType != admissionv1.PatchTypeJSONPatch {
		t.Fatalf("got %+v", answer)
	}
	patch, err := jsonpatch.DecodePatch(answer.Patch)
	if err != nil {
		t.Fatal(err)
	}
	patched, err := patch.Apply([]byte(podText))
	if err != nil {
		t.Fatal(err)
	}
	var pod corev1.Pod
	if err := json.Unmarshal(patched, &pod); err != nil || !inject.HasSidecar(&pod) || !bytes.Contains(patched, []byte("fieldOfTomorrow")) {
		t.Errorf("the patched pod is %s (%v)", patched, err)
	}
	// As it then is it is verified, and injecting it again asks for nothing.
	if _, answer := post(t, s, PathVerify, "application/json; charset=utf-8", review(admissionv1.Create, "Pod", "shop", string(patched))); !answer.Allowed {
		t.Errorf("verify: %s", answer.Result.Message)
	}
	if _, answer := post(t, s, PathInject, "application/json", review(admissionv1.Create, "Pod", "shop", string(patched))); !answer.Allowed || answer.Patch != nil {
		t.Errorf("again: %+v", answer)
	}
}

// In node mode each pod gets a user of its own, also one that brings a sidecar with it: whoever wrote that has not chosen the user.
func TestInjectDrawsUsers(t *testing.T) {
	s, _ := newServer(t)
	s.cfg.Capture = inject.CaptureNode
	seen := map[proxyuser.User]bool{}
	text := []byte(podText)
	for range 8 {
		_, answer := post(t, s, PathInject, "application/json", review(admissionv1.Create, "Pod", "shop", string(text)))
		if !answer.Allowed {
			t.Fatal(answer.Result.Message)
		}
		patch, err := jsonpatch.DecodePatch(answer.Patch)
		if err != nil {
			t.Fatal(err)
		}
		if text, err = patch.Apply(text); err != nil { // the next round is asked about the pod with the user of this one
			t.Fatal(err)
		}
		var pod corev1.Pod
		if err := json.Unmarshal(text, &pod); err != nil {
			t.Fatal(err)
		}
		c := pod.Spec.InitContainers[0].SecurityContext
		u := proxyuser.User{UID: uint32(*c.RunAsUser), GID: uint32(*c.RunAsGroup)}
		if !proxyuser.Pod.Has(u) || seen[u] {
			t.Errorf("%s: seen before, or none of %s", u, proxyuser.Pod)
		}
		seen[u] = true
		if _, answer := post(t, s, PathVerify, "application/json", review(admissionv1.Create, "Pod", "shop", string(text))); !answer.Allowed {
			t.Errorf("verify: %s", answer.Result.Message)
		}
	}
}

func TestAnswers(t *testing.T) {
	s, _ := newServer(t)
	privileged := strings.Replace(podText, `"runAsUser":1`, `"privileged":true`, 1)
	hostNetwork := strings.Replace(podText, `"spec":{`, `"spec":{"hostNetwork":true,`, 1)
	debugged := strings.Replace(podText, `"spec":{`, `"spec":{"initContainers":[{"name":"mantlet-proxy","restartPolicy":"Always"}],
		"ephemeralContainers":[{"name":"d","securityContext":{"capabilities":{"add":["NET_ADMIN"]}}}],`, 1)
	for name, c := range map[string]struct {
		path    string
		op      admissionv1.Operation
		kind    string
		in      string
		object  string
		code    int
		refused string // part of the message
		warned  string // part of the first warning
		patched bool
	}{
		"injected":               {path: PathInject, op: "CREATE", kind: "Pod", in: "shop", object: podText, patched: true, warned: "setuid file"},
		"not asked":              {path: PathInject, op: "CREATE", kind: "Pod", in: "other", object: podText},
		"refused":                {path: PathInject, op: "CREATE", kind: "Pod", in: "shop", object: privileged, refused: "pod shop/web-… is refused"},
		"host network":           {path: PathInject, op: "CREATE", kind: "Pod", in: "shop", object: hostNetwork, warned: "hostNetwork"},
		"update":                 {path: PathInject, op: "UPDATE", kind: "Pod", in: "shop", object: podText},
		"unknown namespace":      {path: PathInject, op: "CREATE", kind: "Pod", in: "gone", object: podText, code: 500},
		"no namespace":           {path: PathInject, op: "CREATE", kind: "Pod", object: podText, code: 500},
		"another kind":           {path: PathInject, op: "CREATE", kind: "Service", in: "shop", object: podText, code: 500},
		"not a pod":              {path: PathInject, op: "CREATE", kind: "Pod", in: "shop", object: `{"spec":1}`, code: 500},
		"not verified":           {path: PathVerify, op: "CREATE", kind: "Pod", in: "shop", object: podText, refused: "the sidecar is missing"},
		"verified, forged":       {path: PathVerify, op: "CREATE", kind: "Pod", in: "shop", object: debuggedNot(debugged), refused: "not the one that was injected"},
		"nothing to verify":      {path: PathVerify, op: "CREATE", kind: "Pod", in: "other", object: podText},
		"debugging":              {path: PathEphemeral, op: "UPDATE", kind: "Pod", in: "shop", object: debugged, refused: "with NET_ADMIN"},
		"debugging, no sidecar":  {path: PathEphemeral, op: "UPDATE", kind: "Pod", in: "shop", object: podText},
		"policy":                 {path: PathPolicy, op: "CREATE", kind: "NetworkPolicy", in: "shop", object: `{"spec":{"podSelector":{}}}`},
		"policy, not as written": {path: PathPolicy, op: "CREATE", kind: "NetworkPolicy", in: "shop", object: `{"metadata":{"annotations":{"mantlet.dev/mode":"audit"}}}`, warned: "admits nobody"},
		"policy gone":            {path: PathPolicy, op: "DELETE", kind: "NetworkPolicy", in: "shop", object: `null`},
	} {
		code, answer := post(t, s, c.path, "application/json", review(c.op, c.kind, c.in, c.object))
		if c.code != 0 {
			if code != c.code {
				t.Errorf("%s: status %d, want %d", name, code, c.code)
			}
			continue
		}
		switch {
		case code != http.StatusOK:
			t.Errorf("%s: status %d", name, code)
		case answer.Allowed != (c.refused == ""), c.refused != "" && !strings.Contains(answer.Result.Message, c.refused):
			t.Errorf("%s: got %+v, want refused: %q", name, answer, c.refused)
		case (answer.Patch != nil) != c.patched:
			t.Errorf("%s: patch %s", name, answer.Patch)
		case (len(answer.Warnings) > 0) != (c.warned != ""), c.warned != "" && !strings.Contains(answer.Warnings[0], c.warned):
			t.Errorf("%s: warnings %q", name, answer.Warnings)
		}
	}
}

func debuggedNot(pod string) string { return strings.Replace(pod, `["NET_ADMIN"]`, `[]`, 1) }

func TestNotReviews(t *testing.T) {
	s, _ := newServer(t)
	good := review(admissionv1.Create, "Pod", "shop", podText)
	for name, c := range map[string]struct {
		contentType, body string
		code              int
	}{
		"empty": {"application/json", "", 400}, "not JSON": {"application/json", "{", 400}, "another version": {"application/json", strings.Replace(good, "k8s.io/v1", "k8s.io/v1beta1", 1), 400},
		"no request": {"application/json", `{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview"}`, 400}, "no uid": {"application/json", strings.Replace(good, "u-1", "", 1), 400},
		"case": {"application/json", strings.Replace(good, `"request"`, `"Request"`, 1), 400}, "YAML": {"application/yaml", good, 415}, "too large": {"application/json", good + strings.Repeat(" ", maxReview), 413},
	} {
		if code, _ := post(t, s, PathInject, c.contentType, c.body); code != c.code {
			t.Errorf("%s: status %d, want %d", name, code, c.code)
		}
	}
	w := httptest.NewRecorder()
	s.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, PathInject, nil))
	if w.Code != http.StatusMethodNotAllowed {
		t.Errorf("GET: status %d", w.Code)
	}
}

// The API server verifies the Service's name against the authority's roots.
func TestServe(t *testing.T) {
	s, authority := newServer(t)
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, l) }()
	material, err := authority.Material()
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(material.Roots)
	get := func(name string) error {
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: name}}}
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+l.Addr().String()+PathHealth, nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(r)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		_, err = io.Copy(io.Discard, resp.Body)
		return err
	}
	if err := get("mantlet.mantlet-system.svc"); err != nil {
		t.Error(err)
	}
	if get("other.mantlet-system.svc") == nil {
		t.Error("it shows a certificate for a name that is not its own")
	}
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// FuzzReview: whatever is posted, the answer is one that the API server understands: an HTTP error, or a review with the request's uid,
// whose patch applies to the object.
func FuzzReview(f *testing.F) {
	f.Add(PathInject, review(admissionv1.Create, "Pod", "shop", podText))
	f.Add(PathVerify, review(admissionv1.Create, "Pod", "shop", podText))
	f.Add(PathEphemeral, review(admissionv1.Update, "Pod", "shop", podText))
	f.Add(PathPolicy, review(admissionv1.Create, "NetworkPolicy", "shop", `{"spec":{"ingress":[{"from":[{}]}]}}`))
	f.Add(PathInject, review(admissionv1.Create, "Pod", "shop", `{"metadata":{"annotations":null},"spec":{"initContainers":[],"volumes":null,"containers":[{}]}}`))
	s, _ := newServer(f)
	f.Fuzz(func(t *testing.T, path, body string) {
		memory := &share{of: new(budget)}
		q, err := readReview(httptest.NewRequest(http.MethodPost, PathInject, strings.NewReader(body)), podLoad, memory)
		if err != nil {
			if code, _ := post(t, s, PathInject, "application/json", body); code != http.StatusBadRequest && code != http.StatusRequestEntityTooLarge {
				t.Fatalf("status %d for what is no review: %v", code, err)
			}
			return
		}
		switch path {
		case PathInject, PathVerify, PathEphemeral, PathPolicy:
		default:
			path = PathInject
		}
		r := httptest.NewRequest(http.MethodPost, path, strings.NewReader(body))
		r.Header.Set("Content-Type", "application/json")
		w := httptest.NewRecorder()
		s.Handler().ServeHTTP(w, r)
		if w.Code != http.StatusOK {
			return
		}
		var answer admissionv1.AdmissionReview
		if err := json.Unmarshal(w.Body.Bytes(), &answer); err != nil || answer.Response == nil || answer.Response.UID != q.UID {
			t.Fatalf("not an answer: %s (%v)", w.Body, err)
		}
		if answer.Response.Patch == nil {
			return
		}
		patch, err := jsonpatch.DecodePatch(answer.Response.Patch)
		if err != nil {
			t.Fatal(err)
		}
		var pod corev1.Pod
		if json.Unmarshal(q.Object.Raw, &pod) != nil || !bytes.Contains(q.Object.Raw, []byte(`"metadata"`)) || !bytes.Contains(q.Object.Raw, []byte(`"spec"`)) {
			return // the API server sends no pod without metadata and spec
		}
		canonical, err := json.Marshal(pod) // as the API server writes what it has read
		if err != nil {
			t.Fatal(err)
		}
		if _, err := patch.Apply(canonical); err != nil {
			t.Fatalf("patch %s of %s: %v", answer.Response.Patch, canonical, err)
		}
	})
}
