package retired

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/test/cluster"
	"github.com/mantlet/mantlet/test/cluster/apitest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// store is a real API server with the namespace of the Secret.
type store struct {
	t      *testing.T
	client kubernetes.Interface
	clock  clock
}

// clock is what all replicas go by.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) forward(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func newStore(t *testing.T) *store {
	t.Helper()
	c := apitest.Client(t, apitest.Start(t, cluster.APIServerOptions{}))
	if _, err := c.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: names.SystemNamespace}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	return &store{t: t, client: c, clock: clock{now: noon}}
}

// replica is one that runs, and what its control plane is told.
type replica struct {
	*Records
	log  bytes.Buffer // read after stop
	stop func()

	mu       sync.Mutex
	recalled []policy.Retirement
	bound    []policy.Binding
	told     chan struct{} // holds a token after each call
}

func (s *store) start() *replica {
	s.t.Helper()
	r := &replica{told: make(chan struct{}, 1)}
	r.Records = New(Config{Client: s.client, Watch: s.client, Name: types.NamespacedName{Namespace: names.SystemNamespace, Name: names.RetiredSecret},
		Worst: time.Hour, Now: s.clock.Now, Log: slog.New(slog.NewTextHandler(&r.log, nil))})
	if err := r.Open(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
	if err := r.recall(r.Known()); err != nil {
		s.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- r.Run(ctx, r.recall) }()
	r.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			s.t.Error(err)
		}
	})
	s.t.Cleanup(func() {
		r.stop()
		if s.t.Failed() {
			s.t.Log(r.log.String())
		}
	})
	return r
}

func (r *replica) recall(retirements []policy.Retirement, bindings []policy.Binding) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.recalled, r.bound = retirements, bindings
	select {
	case r.told <- struct{}{}:
	default:
	}
	return nil
}

// knows waits until the replica's control plane has been told of something.
func (r *replica) knows(t *testing.T, what string, of func([]policy.Retirement, []policy.Binding) bool) {
	t.Helper()
	end := time.After(time.Minute)
	for {
		r.mu.Lock()
		ok := of(r.recalled, r.bound)
		r.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-r.told:
		case <-end:
			t.Fatalf("after a minute it does not know: %s", what)
		}
	}
}

func told(of policy.Retirement) func([]policy.Retirement, []policy.Binding) bool {
	return func(list []policy.Retirement, _ []policy.Binding) bool {
		return slices.ContainsFunc(list, func(r policy.Retirement) bool {
			return r.UID == of.UID && r.ID == of.ID && !r.Until.Before(of.Until)
		})
	}
}

func (s *store) recorded(r *replica, uid string) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), time.Minute)
	defer cancel()
	if err := r.Await(ctx, uid); err != nil {
		s.t.Fatal(err)
	}
}

// secret is the Secret now; nil: there is none.
func (s *store) secret() *corev1.Secret {
	s.t.Helper()
	is, err := s.client.CoreV1().Secrets(names.SystemNamespace).Get(s.t.Context(), names.RetiredSecret, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return is
}

func (s *store) update(is *corev1.Secret) {
	s.t.Helper()
	if _, err := s.client.CoreV1().Secrets(names.SystemNamespace).Update(s.t.Context(), is, metav1.UpdateOptions{}); err != nil {
		s.t.Fatal(err)
	}
}

func (s *store) await(what string, holds func() bool) {
	s.t.Helper()
	look := time.NewTicker(20 * time.Millisecond)
	defer look.Stop()
	for end := time.Now().Add(time.Minute); !holds(); <-look.C {
		if time.Now().After(end) {
			s.t.Fatalf("after a minute not yet: %s", what)
		}
	}
}

// TestReplicas: what one replica records the others hear, also those that start when it is gone; what all of them record at once is all there; nothing is
// written that says nothing new; and it is gone when its time has come.
func TestReplicas(t *testing.T) {
	s := newStore(t)
	one, two := s.start(), s.start()
	if s.secret() != nil {
		t.Error("nothing is retired, and that is written down")
	}
	first := retirement("shop/api", "a", 1, noon.Add(time.Hour))
	one.Record(first)
	s.recorded(one, first.UID)
	if is, errs := decode(s.secret().Data, noon); len(errs) > 0 || !is.covers(first) {
		t.Fatalf("is said to be on record, and is not: %v", errs)
	}
	two.knows(t, "what the other has retired", told(first))

	// The other replica sees the same a moment later.
	version := s.secret().ResourceVersion
	again := first
	again.Until = first.Until.Add(20 * time.Second)
	two.Record(again)
	s.recorded(two, again.UID)
	if now := s.secret().ResourceVersion; now != version {
		t.Errorf("what says nothing new is written: version %s, then %s", version, now)
	}

	// Both write at once, again and again.
	var all []policy.Retirement
	for i := range 40 {
		r := retirement("shop/api", "b", 10+i, noon.Add(time.Hour))
		all = append(all, r)
		[]*replica{one, two}[i%2].Record(r)
	}
	s.recorded(one, "b")
	s.recorded(two, "b")
	is, errs := decode(s.secret().Data, noon)
	for _, r := range append(all, first) {
		if !is.covers(r) || len(errs) > 0 {
			t.Errorf("%s is not on record: %v", r.ID, errs)
		}
	}
	one.stop()
	two.stop()

	third := s.start()
	third.knows(t, "what was retired before it started", func(list []policy.Retirement, b []policy.Binding) bool {
		return told(first)(list, b) && len(list) == 1+len(all) && len(b) == 0
	})

	// An end passes, and what it allows for clocks that run ahead.
	later := retirement("shop/db", "c", 2, noon.Add(3*time.Hour))
	third.Record(later)
	s.recorded(third, later.UID)
	s.clock.forward(time.Hour + lag)
	touch := func() {
		now := s.secret()
		now.Annotations = map[string]string{"at": s.clock.Now().String()}
		s.update(now)
	}
	touch()
	s.await("the replica has looked", func() bool { return len(third.wake) == 0 })
	if _, there := s.secret().Data["a"]; !there {
		t.Error("dropped before its end, which is a minute later than it was told")
	}
	s.clock.forward(ahead + time.Second)
	touch()
	s.await("what has ended is gone", func() bool { return len(s.secret().Data) == 1 })
	if is, _ := decode(s.secret().Data, noon); !is.covers(later) {
		t.Error("what has not ended is gone")
	}
}

// TestExpiry: it needs no event for what has ended to be gone.
func TestExpiry(t *testing.T) {
	s := newStore(t)
	r := New(Config{Client: s.client, Watch: s.client, Name: types.NamespacedName{Namespace: names.SystemNamespace, Name: names.RetiredSecret},
		Worst: time.Hour, Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	r.lag = 0
	of := retirement("shop/api", "a", 1, time.Now().Add(2*time.Second-ahead))
	r.Record(of)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- r.Run(ctx, func([]policy.Retirement, []policy.Binding) error { return nil }) }()
	s.await("it is on record", func() bool { is := s.secret(); return is != nil && len(is.Data) == 1 })
	s.await("it is gone", func() bool { return len(s.secret().Data) == 0 })
	if known, _ := r.Known(); len(known) > 0 || time.Now().Before(of.Until) {
		t.Errorf("at %s is known %v", time.Now(), known)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestTampered: whatever somebody does to the Secret, a replica that knows better puts it back, and one that does not assumes the worst; both say so.
func TestTampered(t *testing.T) {
	s := newStore(t)
	one := s.start()
	first := retirement("shop/api", "a", 1, noon.Add(time.Hour))
	one.Record(first)
	s.recorded(one, first.UID)
	on := func() bool {
		is := s.secret()
		if is == nil {
			return false
		}
		now, errs := decode(is.Data, noon)
		return len(errs) == 0 && now.covers(first)
	}
	secrets := s.client.CoreV1().Secrets(names.SystemNamespace)
	for name, tamper := range map[string]func(*corev1.Secret){
		"emptied":       func(is *corev1.Secret) { is.Data = nil },
		"another entry": func(is *corev1.Secret) { is.Data = written(t, other()) },
		"an earlier end": func(is *corev1.Secret) {
			s := newState()
			s.add(retirement("shop/api", "a", 1, noon))
			is.Data = written(t, s)
		},
		"another address": func(is *corev1.Secret) {
			is.Data["a"] = bytes.ReplaceAll(is.Data["a"], []byte("10.64.0.2"), []byte("10.64.0.9"))
		},
		"another identity": func(is *corev1.Secret) { is.Data["a"] = bytes.ReplaceAll(is.Data["a"], []byte("1\":"), []byte("2\":")) },
	} {
		is := s.secret()
		tamper(is)
		s.update(is)
		s.await(name, on)
	}
	if err := secrets.Delete(t.Context(), names.RetiredSecret, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	s.await("deleted", on)
	if b := s.secret(); one.Problem() != nil || len(b.Data) > 3 {
		t.Errorf("%v %s", one.Problem(), b.Data)
	}

	// What is no record at all: all are bound, as it can have said anything.
	is := s.secret()
	is.Data["a"] = []byte("nonsense")
	s.update(is)
	worst := func(_ []policy.Retirement, b []policy.Binding) bool {
		return len(b) == 1 && b[0].Namespace == "" && b[0].Until.Equal(noon.Add(time.Hour)) && strings.Contains(b[0].Why, "key a: invalid character")
	}
	one.knows(t, "the worst", worst)
	s.await("mended", on)
	if err := one.Problem(); err == nil || !strings.Contains(err.Error(), "secret mantlet-system/mantlet-retired was broken and is mended: key a") {
		t.Errorf("the replica says %v", err)
	}
	one.stop()
	if !strings.Contains(one.log.String(), `level=ERROR msg="what is on record of retired identities is broken`) {
		t.Errorf("nothing is logged:\n%s", one.log.String())
	}
	two := s.start() // while the Secret is whole, the worst is on record
	two.knows(t, "the worst", worst)
	two.stop()

	// Broken while nobody runs.
	is = s.secret()
	is.Data = map[string][]byte{"a": []byte("{}")}
	s.update(is)
	three := s.start()
	three.knows(t, "the worst", func(r []policy.Retirement, b []policy.Binding) bool {
		return len(r) == 0 && len(b) == 1 && b[0].Namespace == ""
	})
	if b, errs := decode(s.secret().Data, noon); len(errs) > 0 || len(b.bound) != 1 {
		t.Errorf("it is not mended: %v %v", errs, s.secret().Data)
	}
	three.stop()

	// One that cannot be written any more.
	is = s.secret()
	is.Immutable = new(true)
	s.update(is)
	four := s.start()
	second := retirement("shop/api", "d", 7, noon.Add(time.Hour))
	four.Record(second)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	if err := four.Await(ctx, second.UID); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "cannot be put on record: secret mantlet-system/mantlet-retired:") {
		t.Errorf("not on record, and that is said: %v", err)
	}
	if err := secrets.Delete(t.Context(), names.RetiredSecret, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	s.recorded(four, second.UID)
	if four.Problem() != nil && strings.Contains(four.Problem().Error(), "cannot be put on record") {
		t.Errorf("it is on record, and it is said: %v", four.Problem())
	}
}

// other is a record of somebody else.
func other() state {
	s := newState()
	s.add(retirement("else/x", "z", 3, noon.Add(time.Hour)))
	return s
}
