package org.fleetune.demo;

import android.app.Notification;
import android.app.NotificationManager;
import android.content.Context;
import android.content.Intent;

/** What every phone from API 26 on has, and the newest android.jar that Debian packages (API 23) has not: called by name. */
final class Newer {
    private static final String CHANNEL = "training";
    private static final int IMPORTANCE_LOW = 2;

    private Newer() {
    }

    /** Context.startForegroundService(Intent). */
    static void startForegroundService(Context context, Intent asked) {
        try {
            Context.class.getMethod("startForegroundService", Intent.class).invoke(context, asked);
        } catch (ReflectiveOperationException absent) {
            throw new IllegalStateException(absent);
        }
    }

    /** new Notification.Builder(Context, String), on a channel of that name, without sound. */
    static Notification.Builder notification(Context context, String name) {
        try {
            Class<?> kind = Class.forName("android.app.NotificationChannel");
            Object channel = kind.getConstructor(String.class, CharSequence.class, int.class)
                    .newInstance(CHANNEL, name, IMPORTANCE_LOW);
            Object all = context.getSystemService(Context.NOTIFICATION_SERVICE);
            NotificationManager.class.getMethod("createNotificationChannel", kind).invoke(all, channel);
            return Notification.Builder.class.getConstructor(Context.class, String.class).newInstance(context, CHANNEL);
        } catch (ReflectiveOperationException absent) {
            throw new IllegalStateException(absent);
        }
    }
}
